"""Compressed models for other programs: Hugging Face, GPTQ, compressed-tensors.

`layout.py` says where a tensor goes and which models have a place at all; a format turns one matrix
into tensors (`plain.py`, `gptq.py`, `packed.py`); `write.py` goes through the artefact.
"""
