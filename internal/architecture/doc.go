// Package architecture checks the structure of the code: that packages import neither their parent nor each other in a cycle,
// that the product imports no test code, and how large a file, a
// function and a type may become. It protects against code that cannot be read from the top down, such as a package
// that imports its parent, or a type to which everything is attached.
package architecture
