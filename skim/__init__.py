"""What every Skim process shares, and the user's door: `client`, `cli`."""

import os

# gRPC's own lines on standard error are not JSON, and say nothing that an error of ours does not.
# It reads this while it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
