"""Rewrites of a site: a norm with what stands around it."""
