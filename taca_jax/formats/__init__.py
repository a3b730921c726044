"""The layouts that others store weights in, as tables of names, and one strict engine for them."""
