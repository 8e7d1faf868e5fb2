"""From files on disk to packs on the CPU.

    indexed/    records on disk (latent moments, text embedding, metadata), checked, mapped without a copy
    corpus.py   several of these datasets as one, with weights
    planner.py  which samples share a pack in step n: a pure function of the index columns, the seed and the config
                order.py: the endless shuffled stream; balance.py: full packs of equal cost
    pack.py     the tensors of one pack beside its layout
    loader.py   plan -> packs of one data-parallel rank, prefetched in a thread; resumable

    video.py transforms.py images.py    videos and images on disk -> frames, resized and cropped
    clips.py    clips as pixels, for VAE training and encoding

Ranks and sizes reach this package as integers; it knows nothing of process groups or models.
"""
