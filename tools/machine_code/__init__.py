"""What the compiled Triton kernels are, read from their machine code: no GPU is needed, and none is used.

A launch is recorded from the very launcher that runs on a GPU (`compiled.recorded_launches`), compiled for a device
that need not be there (`compiled.compile_launch`), disassembled with the tools of Triton's wheel (`disassembly`) and
read (`report.read`): registers, spills, shared memory, occupancy, and the number of instructions that one warp issues
in one program (`counts`). `traffic` has what its programs read and write. Three commands use all this, from the root of
a checkout:

    python -m tools.machine_code.budget        what each kernel may use, held to budget.json
    python -m tools.machine_code.choose        launch configurations, chosen by compiling candidates
    python -m tools.machine_code.time_model    a model of time from the counts and public specifications

How the instructions are counted
    The machine code becomes a graph of basic blocks. Back edges give its natural loops; the trip count of each is known
    from the shape (ceil(N / BLOCK_N)). The count is that of the longest path, each loop taken as often as it runs. So
    of two exclusive branches the longer counts: the ordinary head, which needs content and position, not the one whose
    gate is saturated. On sm_100 one warp of a program issues the matrix products and the others branch around them:
    each of the two kinds has a path of its own. Loops that only wait (for a barrier) count as not entered: the wait
    succeeds at the first try. An instruction whose predicate is false takes its issue slot and counts. `Report.macs` is
    a check on all of this: the matrix multiply-accumulates on the path must equal what the tile's arithmetic asks for.
    On AMD nothing is counted: its code walks through all branches in turn with lanes switched off, so its graph does
    not tell which exclude each other.

What such counts say, and what they do not
    They say how much work the schedulers must issue, whether values fit the registers, and how two kernels of the same
    tile compare in that. They say nothing of time spent in waiting: memory and L2 latency, bank conflicts, barriers,
    dependent instructions, or which units run side by side. One matrix instruction counts as one, though it keeps its
    unit busy for many cycles (`time_model` weighs them). A ratio of counts is therefore a bound on what the position
    adds to the *issued* work, not a prediction of the ratio of times. Only a GPU measures time.

Under ``TRITON_INTERPRET=1`` the kernels are interpreter objects that cannot be compiled: use a process without it.
"""
