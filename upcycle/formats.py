"""The names of the formats of checkpoints: the command line shows them before anything heavy is loaded."""

FORMATS = ('upcycle', 't5x_legacy', 't5x_orbax', 'huggingface', 'vit_npz')  # read and written
