// Command bench measures NMI and MIC. It prints the figures and writes them to a file as one flat JSON object.
//
// NMI runs on a simulated node, which is a network namespace that is connected to the test cluster. NMI uses the
// cluster's real API server and a fake IMDS. The node has 250 pods. Each pod is a Pod object and an address in a second
// network namespace; bench sends the pod's requests from this address. By default, the cluster has 5,000 identities
// with their bindings.
//
// NMI is compared with the bare handler: a net/http server that returns the same response body to each request, on a
// second simulated node with the same iptables rules. Rounds of NMI and of the bare handler alternate, so that the
// ratio is valid on a noisy host. At the end, bench measures how long NMI takes for the first token of an identity, for
// identities of each source, with a fake Entra ID.
//
// The comments of micEnvironment and measureMIC describe the environment and the measurements of MIC.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/podidentity/podidentity/e2e/cluster"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "bare" {
		exit(bare(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == "connect" {
		exit(connect(os.Args[2:]))
	}
	var p plan
	out := flag.String("o", "bench.json", "`file` for the figures")
	seconds := flag.Float64("seconds", 3, "length of one round of NMI or of the bare handler (see -rounds), in `seconds`")
	flag.IntVar(&p.rounds, "rounds", 7, "number of rounds of NMI, and of the bare handler (an HTTP server that NMI is compared with)")
	flag.IntVar(&p.identities, "identities", 5000, "AzureIdentities in the cluster for NMI")
	flag.IntVar(&p.cold, "cold", 60, fmt.Sprintf("number of identities of each source whose first token is measured, at most %d", maxCold))
	flag.StringVar(&p.profiles, "profiles", "", "`folder` for profiles of NMI under load, and of MIC")
	flag.StringVar(&p.only, "only", "", "measure only `nmi or mic`")
	flag.IntVar(&p.mic.few, "few-pods", 2000, "pods in the small cluster for MIC")
	flag.IntVar(&p.mic.many, "many-pods", 20000, "pods in the large cluster for MIC; 0: measure only the small cluster")
	flag.IntVar(&p.mic.fewReplaced, "few-replaced", 400, "pods that are replaced in the small cluster")
	flag.IntVar(&p.mic.manyReplaced, "many-replaced", 2000, "pods that are replaced in the large cluster")
	flag.Float64Var(&p.mic.rate, "rate", 25, "pods that are replaced per `second`")
	flag.IntVar(&p.mic.burst, "burst", 1000, "pods that are replaced at once, in the last measurement of MIC")
	flag.StringVar(&p.mic.args, "mic-args", "", "additional `flags` for MIC, separated by spaces")
	flag.Parse()
	p.round, p.mic.profiles = time.Duration(*seconds*float64(time.Second)), p.profiles
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	figures, err := run(ctx, p)
	if err == nil {
		err = write(*out, figures)
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func write(file string, figures map[string]float64) error {
	text, err := json.MarshalIndent(figures, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func printLine(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// plan is what to measure.
type plan struct {
	round                    time.Duration
	rounds, identities, cold int
	profiles                 string // a folder; "" for none
	only                     string // nmi or mic; "" for both
	mic                      micPlan
}

func run(ctx context.Context, p plan) (map[string]float64, error) {
	if p.cold < 1 || p.cold > maxCold {
		return nil, fmt.Errorf("invalid -cold=%d: it must be 1 to %d, because each identity of each source needs a pod of its own", p.cold, maxCold)
	}
	figures := map[string]float64{}
	if p.only != "mic" {
		if err := measureNMI(ctx, p, figures); err != nil {
			return nil, err
		}
	}
	if p.only != "nmi" {
		if err := measureMIC(ctx, p.mic, figures); err != nil {
			return nil, err
		}
	}
	return figures, nil
}

func measureNMI(ctx context.Context, p plan, figures map[string]float64) error {
	return withEnvironment(ctx, p.identities, func(r *environment) error {
		calls, slowest, err := r.burst(ctx)
		if err != nil {
			return err
		}
		printLine("\n%d pods requested a token of one identity at once: %d token request(s) to IMDS, last response after %s", pods, calls, slowest.Round(time.Millisecond))
		figures["nmi.burst250.imds_calls"] = float64(calls)
		if err := r.startBare(ctx); err != nil {
			return err
		}
		if err := r.compare(ctx, figures, p.round, p.rounds); err != nil {
			return err
		}
		if err := compareConnections(ctx, r, figures, p.round); err != nil {
			return err
		}
		if p.profiles != "" {
			if err := r.profile(ctx, p.profiles, 5*time.Second); err != nil {
				return err
			}
		}
		// This measurement is last, because it binds pods to other identities.
		firsts, err := r.cold(ctx, p.cold)
		if err == nil {
			reportCold(figures, firsts)
		}
		return err
	})
}

// withEnvironment starts a cluster, creates the objects, starts NMI on its simulated node, calls do, and stops
// everything.
func withEnvironment(ctx context.Context, identities int, do func(*environment) error) (err error) {
	c, err := cluster.Start(ctx, cluster.Options{WithoutAzure: true, Progress: func(line string) { printLine("   %s", line) }})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()
	if _, err := c.Kubectl(ctx, "apply", "--server-side", "-f", filepath.Join(repo(), "deploy", "podidentity", "crds")); err != nil {
		return err
	}
	printLine("creating %d identities with bindings and %d pods", identities, pods)
	if err := makeObjects(ctx, c, identities); err != nil {
		return err
	}
	r, err := newEnvironment(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.startNMI(ctx); err != nil {
		return err
	}
	return do(r)
}
