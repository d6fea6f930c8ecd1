"""The scheduler's core under a virtual clock: the real policy, workers that are a cost model.

    profiles     what a step costs on a named machine with a named model
    worker       executes step plans: keeps rows, answers results, says how long each step took
    simulation   the event loop: arrivals, plans in flight, results, in virtual nanoseconds
    allocation   the memory policies of the paper's baselines, as other schedulers of the same engine
    memory       what every token slot of a KV pool is used for at one moment
    scale        what grows with the number of workers
    calibrate    fits a profile to recorded steps
    recorded     a profile from a recording, by costs per step, sequence, token and block

Nothing here has a clock or randomness of its own: equal arrivals and profiles give equal outcomes.
"""
