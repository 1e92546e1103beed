"""A simulator of PTX: runs what Triton compiles of a kernel, on the CPU, and checks all that it does to memory.

Triton's interpreter runs a kernel's Python source, program by program. What the compiler makes of it is another matter: how
a tile is dealt to threads, what they exchange through shared memory, where they wait for each other. Here that code itself
runs. `launching.simulated` has operators' launchers do so; the other modules, from the bottom up:

- `parsing`: the text as instructions;
- `values`: what an instruction computes from registers, on the 32 lanes of a warp;
- `memory`: bytes that know whether they were set and who used them last;
- `warpgroups`: products of matrices that four warps start together (sm_90);
- `steps`: instructions bound to the registers and the memory of the warp that does them;
- `running`: warps, blocks, a launch.

What it does not know it refuses by name: `Unknown`. What a kernel does wrong is a `Fault`. It does not see races between
lanes of one warp, for these run in step; nor does it round exponentials, and the sums of a product of matrices, as a GPU
does: here they are exact, and then rounded.
"""
