"""What is measured, against whom, against which limit, and how it is reported."""
