"""The Hugging Face Hub: names, failures, publishing a folder, fetching files, atlases as data sets.

`huggingface_hub` is imported only when a request is made.
"""
