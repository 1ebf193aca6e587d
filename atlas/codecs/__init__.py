"""Arrays in Zarr decoded: by one compiled call where Atlas's layout allows it, else by zarr-python.

Whatever is absent, short or flipped is an error on both paths. Stores and readers of files use it.
"""
