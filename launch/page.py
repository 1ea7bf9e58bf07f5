"""stub"""
def write(directory, sweep, rows):
    return "page"
