package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/pflag"

	micoptions "github.com/podidentity/podidentity/cmd/mic/options"
	nmioptions "github.com/podidentity/podidentity/cmd/nmi/options"
)

// fromEnvironment are the environment variables that defaults of flags come from. Such a default is shown as the name
// of the variable.
var fromEnvironment = []string{"NODE_NAME", "KUBECONFIG", "MIC_POD_NAMESPACE"}

func setEnvironment() error {
	for _, name := range fromEnvironment {
		if err := os.Setenv(name, "$"+name); err != nil {
			return err
		}
	}
	return os.Unsetenv("FORCENAMESPACED")
}

const chartValueParagraph = "The column \"Chart value\" names the [value of the chart](chart-values.md) that sets the flag, or decides whether the chart passes it, if there is one."

func nmiFlags(root string) ([]byte, error) {
	d := newDocument("Flags of NMI", "cmd/nmi/options and the chart's nmi-daemonset.yaml")
	d.paragraph(chartValueParagraph)
	d.paragraph("`nmi uninstall` removes NMI's rules and network interface from the node. It takes the flags of the listener, the capture and " +
		"the log. With `--wait-for-signal` it keeps running afterwards, until a signal, for a DaemonSet; `--hold` is the old name of that flag.")
	return flagPage(d, root, "nmi-daemonset.yaml", func(f *pflag.FlagSet) { nmioptions.New().AddFlags(f) })
}

func micFlags(root string) ([]byte, error) {
	d := newDocument("Flags of MIC", "cmd/mic/options and the chart's mic-deployment.yaml")
	d.paragraph(chartValueParagraph)
	d.paragraph("`mic plan` prints what MIC would attach and detach, why, and with which requests, and sends none of them. `mic uninstall` detaches what " +
		"MIC attached and removes what it wrote into the cluster. Both take the same flags as MIC. With `--wait-for-signal`, `mic uninstall` keeps " +
		"running afterwards and responds to `/readyz` on the probe port, until a signal, for a Deployment; `--hold` is the old name of that flag.")
	return flagPage(d, root, "mic-deployment.yaml", func(f *pflag.FlagSet) { micoptions.New().AddFlags(f) })
}

// flagPage completes a page of flags. template is the file of the chart that sets them.
func flagPage(d *document, root, template string, addFlags func(*pflag.FlagSet)) ([]byte, error) {
	if err := setEnvironment(); err != nil {
		return nil, err
	}
	chartValues, err := valuesOfFlags(root, template)
	if err != nil {
		return nil, err
	}
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	addFlags(flags)
	current, deprecated, err := flagRows(flags, chartValues)
	if err != nil {
		return nil, err
	}
	d.table([]string{"Flag", "Default", "Chart value", "Description"}, current)
	d.heading(2, "Deprecated flags")
	d.paragraph("Manifests of AAD Pod Identity contain these flags. They are accepted with a warning.")
	d.table([]string{"Flag", "What to do"}, deprecated)
	return d.Bytes(), nil
}

// flagRows returns the table rows of the current flags and of the deprecated flags. It leaves out a flag that is hidden
// but not deprecated. chartValues has the names of the chart values, by the name of the flag. flagRows returns an error
// if a current flag has no description.
func flagRows(flags *pflag.FlagSet, chartValues map[string]string) (current, deprecated [][]string, err error) {
	var problems []error
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Deprecated != "" {
			deprecated = append(deprecated, []string{code("--" + f.Name), plain(f.Deprecated)})
			return
		}
		if f.Hidden {
			return
		}
		placeholder, usage := pflag.UnquoteUsage(f)
		if strings.TrimSpace(usage) == "" {
			problems = append(problems, fmt.Errorf("the flag --%s has no description", f.Name))
		}
		name := "--" + f.Name
		if placeholder != "" {
			name += " " + strings.ToUpper(placeholder)
		}
		value := chartValues[f.Name]
		if value != "" {
			value = code(value)
		}
		current = append(current, []string{code(name), flagDefault(f), value, plain(usage)})
	})
	return current, deprecated, errors.Join(problems...)
}

// flagDefault returns the default of a flag as Markdown, or "" for a flag without a default. For the flag whose default
// is the name of the host it returns a description instead, because this name differs on each host.
func flagDefault(f *pflag.Flag) string {
	switch {
	case f.Name == "leader-election-instance":
		return "the host's name"
	case f.DefValue == "" || f.DefValue == "[]":
		return ""
	}
	return code(f.DefValue)
}
