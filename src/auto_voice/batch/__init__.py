"""Many conversions: jobs, their manifest, and what executes them."""
