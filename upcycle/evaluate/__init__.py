"""What a model is worth: over a split (`validation.py`), and by a linear probe of its frozen features (`few_shot.py`)."""
