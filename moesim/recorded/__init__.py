"""A training step of one's own program as data: its operations, what each costs, and how it scales to other sizes."""
