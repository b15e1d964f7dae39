// Command typecheck type checks packages of the module in FOLDER for another architecture, with everything that they
// import.
//
//	typecheck FOLDER ARCHITECTURE PACKAGE...
//
// It protects against code that builds on the developer's architecture alone: on the other one, a build constraint may
// leave out a file, or a constant or field may have another type. It compiles nothing, so it takes seconds where a
// build of all dependencies takes minutes. It does not find errors that only the compiler or the linker reports.
package main

import (
	"fmt"
	"os"

	"golang.org/x/tools/go/packages"
)

func main() {
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: typecheck FOLDER ARCHITECTURE PACKAGE...")
		os.Exit(2)
	}
	count, err := check(os.Args[1], os.Args[2], os.Args[3:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "type checking:", err)
		os.Exit(1)
	}
	fmt.Printf("checked the types of %d packages for %s; found no errors\n", count, os.Args[2])
}

// check type checks the packages and their dependencies, and prints the errors. It returns how many packages it
// checked.
func check(folder, arch string, patterns []string) (int, error) {
	cfg := &packages.Config{
		Mode: packages.LoadAllSyntax,
		Dir:  folder,
		Env:  append(os.Environ(), "GOARCH="+arch, "CGO_ENABLED=0"),
	}
	loaded, err := packages.Load(cfg, patterns...)
	if err != nil {
		return 0, err
	}
	count := 0
	packages.Visit(loaded, nil, func(*packages.Package) { count++ })
	if failed := packages.PrintErrors(loaded); failed > 0 {
		return 0, fmt.Errorf("%d errors for %s", failed, arch)
	}
	return count, nil
}
