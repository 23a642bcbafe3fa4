"""The audit: what it runs and measures, and its page."""
