"""What one attention layer computes, with torch alone: this folder can be copied into a project of one's own.

policies (and fastgen): what is kept; features: the kernels phi and psi, and rho; slots: where tokens are kept; state: all that a
layer remembers; step: `extend`, the one verb, by attend, decode (one token) and prompt (many); stream: tokens one at a time;
context: streams without end; parallel: a whole stream at once, for training.
"""
