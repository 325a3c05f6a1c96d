"""What is known of a captured graph before it is rewritten."""
