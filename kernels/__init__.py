"""Operations on tensors: one op set in three implementations (reference, gpu, cpu).

Nothing here knows about requests, models or servers; the only imports are torch, triton and,
for ``cpu``, the compiled core.
"""
