"""What `wsc-backend demo` needs beside the backend: a Label Studio of its own and slides to look at."""
