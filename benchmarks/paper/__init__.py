"""The PagedAttention paper's experiments (Kwon et al., SOSP 2023) on our scheduler, simulated.

python -m benchmarks.paper waste                  one experiment: benchmarks/results/paper/waste.json
python -m benchmarks.paper all plots page         everything, the plots in docs/paper/, the tables of docs/paper.md
"""
