"""What Weights & Biases shows of tables and sweeps: saved views and reports."""
