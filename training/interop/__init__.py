"""Models of other programs: Hugging Face folders and GGUF files, in and out.

`families.py` lists the layouts; `read_config.py` and `write_config.py` translate settings,
`names.py` tensors; `source.py` reads their files, `take_in.py` and `hand_out.py` convert.
"""
