"""Plans of what is kept and what is made again, for a memory budget."""
