"""Which videos, and as which records? Raw video -> kept clip with its caption -> dataset record.

captions.py reads what a person wrote about some videos, clip.py cuts them (`megacogvx clips`), encode.py turns clips
into latents and text embeddings (`megacogvx encode`).
"""
