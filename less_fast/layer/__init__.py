"""What one attention layer computes, with torch alone: this folder can be copied into a project of one's own.

policies (and fastgen): what is kept; features: the kernels phi and psi; state: what is remembered; attend and step: `extend`,
the one verb; parallel: a whole stream at once, for training.
"""
