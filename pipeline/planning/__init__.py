"""What a job will need, told before anything starts: no GPU, no data, no training.

simulation   one step of the real model on the meta device: FLOPs, and the memory of its activations
memory       weights, gradients and optimizer by ZeRO stage and offload, on a worker and on its host
schedule     steps, samples, epochs, tokens, bytes read from the storage
advice       what fits into a device, and what to change where nothing does
command      `glscl plan`
"""
