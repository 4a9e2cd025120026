"""The names of the checkpoint formats, in a module that is cheap to import for the command line."""

FORMATS = ('upcycle', 't5x_legacy', 't5x_orbax', 'huggingface', 'vit_npz')  # read and written
