"""What the server does in a round: know, plan, admit, sum exactly, average."""
