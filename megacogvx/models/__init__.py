"""What is computed; every model reads like one device, and `parallel/` spreads it.

Tensor names carry their axes, here and in every other room:

    B  batch                    S  tokens of a pack (all, or a rank's share)    N  attention heads
    T  frames                   V  video tokens, one row of a patch each        K  width of a head
    C  channels                 L  text tokens                                  M  samples of a pack, padding included
    H  height                   D  width of the model                           R  rows of a modulation table: 2 M
    W  width                    E  width of the text embedding                  P  values of one patch: C * q * p * p

A digit stands for itself: `hidden_S1D` has the shape [S, 1, D], `modulation_R3D` is [R, 3, D].
"""
