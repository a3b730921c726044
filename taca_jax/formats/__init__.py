"""Weights in the layouts of other projects: key tables, and one strict engine to convert them."""
