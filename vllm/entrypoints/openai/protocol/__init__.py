"""What clients may send, as pydantic models, and small pieces of what they get back."""
