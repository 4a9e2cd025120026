"""Models of llama.cpp, read as the Hugging Face folders that they were made from.

`container` knows bytes and blocks, `models` the names and settings of architectures, `tokenizer` the vocabulary. `reader` joins
them for the reader of Hugging Face folders.
"""
