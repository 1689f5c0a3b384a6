"""The Hugging Face Hub: names there, what can go wrong, publishing a folder, fetching a file, atlases as data sets.

`huggingface_hub` is imported when something is asked of the Hub, not before.
"""
