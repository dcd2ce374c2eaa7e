"""Generators of evaluation items: texts and a tokenizer in, `Item`s and `Passage`s out."""
