"""Training: many SAEs on one feed, with checkpoints. Read `training` first.

training      one training: state, step, checkpoint
fused         steps by the kernels of a GPU, and when the host looks at what they have done
kernel_steps  steps by kernels; those whose entries do not fit are taken again
checkpoint    folders of checkpoints: written whole or not at all, proven before they are used
group         several trainings on one feed, their TensorBoard logs, publication
memory        memory that trainings take on each device, priced before any work
shares        training by several processes that split the features
schedules     what changes in the course of a training
whitening     all directions of the activations vary alike; removed from the SAE in the end
resample      dead features start again where much is unexplained
"""
