"""What all Triton kernels share: the device they run on, their launch, their tuned settings, their production variants."""
