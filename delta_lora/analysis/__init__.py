"""What a run did to a model, measured."""
