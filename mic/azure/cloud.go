package azure

import (
	"cmp"
	"fmt"
	"net/url"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"

	"github.com/podidentity/podidentity/internal/text"
)

// environmentFile is the environment variable with the path of the file that describes a custom cloud.
const environmentFile = "AZURE_ENVIRONMENT_FILEPATH"

// Environment has the endpoints of a custom cloud, in the format of go-autorest.
type Environment struct {
	ResourceManagerEndpoint   string `json:"resourceManagerEndpoint"`
	ActiveDirectoryEndpoint   string `json:"activeDirectoryEndpoint"`
	TokenAudience             string `json:"tokenAudience"`
	ServiceManagementEndpoint string `json:"serviceManagementEndpoint"`
}

func isCustomCloud(name string) bool { return strings.EqualFold(name, "AzureStackCloud") }

func loadEnvironment(path string) (Environment, error) {
	var e Environment
	if path == "" {
		return e, fmt.Errorf("cloud AzureStackCloud requires the environment variable %s; set it to the path of the file that describes the cloud", environmentFile)
	}
	text, err := readFile(path)
	if err != nil {
		return e, fmt.Errorf("%w; set %s to the path of a file that MIC can read, of at most 1 MiB", err, environmentFile)
	}
	if err := parse(text, &e); err != nil {
		return e, fmt.Errorf("%s (%s) %w; correct it", path, environmentFile, err)
	}
	return e, nil
}

// cloud returns the endpoints of ARM and Entra ID in the cloud that the configuration names.
func (c Config) cloud() (cloud.Configuration, error) {
	var found cloud.Configuration
	switch strings.ToLower(c.Cloud) {
	case "", "azurepubliccloud", "azurecloud":
		found = cloud.AzurePublic
	case "azureusgovernmentcloud", "azureusgovernment":
		found = cloud.AzureGovernment
	case "azurechinacloud":
		found = cloud.AzureChina
	case "azurestackcloud":
		custom, err := c.Environment.cloud()
		if err != nil {
			return found, err
		}
		found = custom
	default:
		return found, fmt.Errorf("cloud %q in %s is unknown; set it to AzurePublicCloud, AzureUSGovernmentCloud or AzureChinaCloud, or to AzureStackCloud together with the environment variable %s", text.OneLine(c.Cloud, maxCode), c.source(), environmentFile)
	}
	if c.AuthorityHost != "" {
		if !isHTTPS(c.AuthorityHost) {
			return found, fmt.Errorf("AZURE_AUTHORITY_HOST %q is not an https URL; correct it", text.OneLine(c.AuthorityHost, maxMessage))
		}
		found.ActiveDirectoryAuthorityHost = c.AuthorityHost
	}
	return found, nil
}

func (e Environment) cloud() (cloud.Configuration, error) {
	audience := cmp.Or(e.TokenAudience, e.ServiceManagementEndpoint)
	if !isHTTPS(e.ResourceManagerEndpoint) || audience == "" {
		return cloud.Configuration{}, fmt.Errorf("cloud AzureStackCloud requires resourceManagerEndpoint (an https URL) and tokenAudience; add or correct them in the file that %s names", environmentFile)
	}
	if e.ActiveDirectoryEndpoint != "" && !isHTTPS(e.ActiveDirectoryEndpoint) {
		return cloud.Configuration{}, fmt.Errorf("activeDirectoryEndpoint %q is not an https URL; correct it in the file that %s names", text.OneLine(e.ActiveDirectoryEndpoint, maxMessage), environmentFile)
	}
	return cloud.Configuration{
		ActiveDirectoryAuthorityHost: e.ActiveDirectoryEndpoint,
		Services: map[cloud.ServiceName]cloud.ServiceConfiguration{
			cloud.ResourceManager: {Endpoint: e.ResourceManagerEndpoint, Audience: audience},
		},
	}, nil
}

func isHTTPS(s string) bool {
	u, err := url.Parse(s)
	return err == nil && u.Scheme == "https" && u.Hostname() != ""
}
