"""What several rooms must agree on, in a file that needs no PyTorch."""

# k of DTML's Eq. 2: "as large as possible" in the papers of DTC and DTML, this value in their public implementations.
SDM_STEEPNESS = 1500.0
SDM_EMPTY_RULES = ("sign", "zeros")  # of a distance map without foreground
SDM_HEADS = ("conv", "block")  # before the tanh: a 1x1x1 convolution alone, or with a 3x3x3 block before it
CRITIC_LR = 1e-4  # Adam, as in both public implementations; not decayed
MIN_PATCH = 32  # below this the deepest feature map has one voxel per axis and batch norm degenerates
GROUPS = 8  # of group norm; channels are always multiples of 8 from width 8 on
MIN_BF16_PATCH = 48  # at 32, oneDNN 3.12 returns garbage for the weight gradient of 3x3x3 convolutions of the 2x2x2 map
PLANE = (-3, -2)  # in-plane axes of (..., W, H, D)
