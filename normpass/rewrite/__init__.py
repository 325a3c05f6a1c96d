"""Sites of norms, the contract of their rewrites, and which of them is chosen."""
