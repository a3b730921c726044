"""`python -m convert`, in a checkout: what `taca-convert` is where the package is installed."""
