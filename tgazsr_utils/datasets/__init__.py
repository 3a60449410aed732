"""Where images come from: the mini-world, the published sets, class folders.

``python -m tgazsr_utils.datasets`` lists, checks and fetches them.
"""
