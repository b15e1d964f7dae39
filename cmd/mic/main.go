// Command mic will run the Managed Identity Controller of standard mode. This version has managed mode only, which
// needs no controller, so the command says so and does nothing else.
package main

import (
	"fmt"
	"os"
)

// version is set when a release is built.
var version = "dev"

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Println("mic version", version)
		return
	}
	fmt.Fprintln(os.Stderr, "mic: this version of Pod Identity has no standard mode; assign the identities to the machines yourself and run NMI with --operation-mode managed")
	os.Exit(1)
}
