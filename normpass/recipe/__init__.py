"""What is not kept for backward and how it is made again."""
