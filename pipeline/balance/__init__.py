"""Balance of concepts, after MetaCLIP: Xu et al. (2024), "Demystifying CLIP Data", ICLR, arXiv 2309.16671."""
