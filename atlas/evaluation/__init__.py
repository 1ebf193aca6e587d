"""Measures of an embedding, and the report that shows them; plain arrays in, no store."""
