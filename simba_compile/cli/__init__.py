"""placeholder"""
app = None
