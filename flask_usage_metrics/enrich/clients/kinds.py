"""User-Agent header -> kind of client, by known names and by the patterns of isbot."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources

# Who is who, each name once. Lower case; a name is found as a whole word, anywhere, or only at the
# beginning of the header when it starts with ^ (words that are too common or that apps append).
# Of two kinds in one header the one further up holds: a preview made with curl is a preview.
# Sources: what the operators document; https://github.com/ai-robots-txt/ai.robots.txt (MIT) for
# the purpose of AI crawlers; https://github.com/monperrus/crawler-user-agents (MIT).
_NAMES = {
    # Collects texts for language models or their makers.
    "ai-training": """
        ai2bot, amazonbot, anthropic-ai, apifybot, apifywebsitecontentcrawler,
        applebot-extended, bedrockbot, brightbot, bytespider, ccbot, chatglm-spider, claude-web,
        claudebot, cloudvertexbot, cohere-ai, cohere-training-data-crawler, cotoyogi, crawl4ai,
        deepseekbot, diffbot, facebookbot, firecrawlagent, friendlycrawler,
        google-cloudvertexbot, google-extended, googleother, gptbot, henkbot, icc-crawler,
        imagesiftbot, img2dataset, isscyberriskcrawler, kangaroo bot,
        laion-huggingface-processor, laiondownloader, meta-externalagent, omgili, omgilibot,
        pangubot, sbintuitionsbot, semrushbot-ocob, sidetrade indexer bot, spawning-ai,
        terracotta, thinkbot, tiktokspider, timpibot, velenpublicwebcrawler, webzio-extended,
        wrtnbot, yandexadditional, yandexadditionalbot
    """,
    # Indexes pages for answers that name them.
    "ai-search": """
        addsearchbot, aisearchbot, amazon-kendra, amzn-searchbot, andibot, anomura,
        atlassian-bot, azureai-searchbot, channel3bot, claude-searchbot, cloudflare-autorag,
        duckassistbot, iaskbot, iaskspider, kendrabot, linerbot, linkupbot, meta-webindexer,
        oai-searchbot, perplexitybot, phindbot, shapbot, tavilybot, youbot, zanistabot
    """,
    # Fetches a page because somebody asked an assistant just now.
    "ai-agent": """
        amazon-qbusiness, amazonbuyforme, amzn-user, bigsur.ai, chatgpt agent, chatgpt-user,
        claude-code, claude-user, devin, gemini-deep-research, google-agent, google-gemini-cli,
        google-notebooklm, googleagent-mariner, kagi-fetcher, manus-user, meta-externalfetcher,
        mistralai-user, notebooklm, novaact, perplexity-user, perplexityuser, poggio-citations,
        shap-user, twinagent
    """,
    "monitor": """
        amazon-route53-health-check-service, azure traffic manager endpoint monitor,
        better stack, better uptime bot, betteruptimebot, blackbox exporter, blackbox-exporter,
        catchpoint, check_http, checkhost, checkly, cloudflare-alwaysonline,
        cloudflare-healthchecks, cloudflare-traffic-manager, consul health check, cron-job.org,
        datadog, datadogsynthetics, dotcom-monitor, easycron, elb-healthchecker,
        elmahio-uptimebot, freshpingbot, googlehc, googlestackdrivermonitoring,
        googlestackdrivermonitoring-uptimechecks, gtmetrix, healthchecks.io, hetrixtools,
        honeybadger uptime check, hosttracker, icinga, jetmon, kube-probe, logicmonitor,
        monitoring360bot, montastic-monitor, nagios, newrelicpinger, newrelicsynthetics,
        nixstatsbot, nodeping, ohdear, panopta, pingdom, pingdomtms, ^prometheus,
        prtg network monitor, prtgcloudbot, pulsetic.com, rackspace monitoring, ruxitsynthetic,
        sentryuptimebot, site24x7, solarwinds, statuscake, synthetic-monitoring-agent,
        ^telegraf, thousandeyes, updown.io, uptime-kuma, uptime.com, uptimebot, uptimerobot,
        uptrends, vm_promscrape, wormlybot, zabbix
    """,
    "feed": """
        akregator, awariorssbot, bazqux, blogtrottr, commafeed, feedbin, feedburner, feeder.co,
        feedfetcher-google, feedly, feedlyapp, feedlybot, feedparser, feedsearch-crawler,
        feedspot, flipboardrss, freshrss, g2reader-bot, gwene, inoreader, liferea, magpierss,
        miniflux, monitorss, netnewswire, netvibes, newsblur, newsboat, nextcloud-news, openrss,
        overcast, page2rss, pocketcasts, rss-parser, rssbot, rssingbot, simplepie, superfeedr,
        theoldreader.com, tiny tiny rss, universalfeedparser, yandorirssbot
    """,
    # Shows what a link leads to, in a chat or a post.
    "preview": """
        bingpreview, ^bluesky, cardyb, discordbot, discourse forum onebox, embedly,
        evernoterichlinkbot, facebookcatalog, facebookexternalhit, facebot, flipboardproxy,
        friendica, github-camo, google web preview, googleimageproxy, groupmebot, iframely,
        keybasebot, lemmy, mastodon, mattermost-bot, meta-externalhit, microsoftpreview,
        misskey, odklbot, opengraph.io, ^pinterest, pinterestbot, pleroma, quora-bot, redditbot,
        skypeuripreview, slack-imgproxy, slackbot, slackbot-linkexpanding,
        snap url preview service, snapurlpreview, summalybot, ^synapse, telegrambot, ^tumblr,
        tweetmemebot, twitterbot, ^viber, vkrobot, vkshare, ^whatsapp, yahoo link preview,
        yahoomailproxy
    """,
    "search-bot": """
        360spider, adidxbot, alexandriaorgbot, applebot, aspiegelbot, baiduspider, bingbot,
        bravebot, coccocbot-image, coccocbot-web, daum, daumoa, duckduckbot, duckduckbot-https,
        duckduckgo-favicons-bot, exabot, freespoke, gigabot, google-inspectiontool, googlebot,
        haosouspider, ibou, iboubot, ichiro, istellabot, kagibot, linespider, mail.ru_bot,
        mojeekbot, msnbot, naverbot, petalbot, qwantbot, qwantify, search.marginalia.nu,
        seekport, seekportbot, seznambot, seznamhomepagecrawler, slurp, sogou inst spider,
        sogou pic spider, sogou web spider, sosospider, storebot-google, stractbot, swisscows,
        teoma, toutiaospider, wotbox, y!j-asr, yacybot, yandexaccessibilitybot, yandexblogs,
        yandexbot, yandexfavicons, yandeximageresizer, yandeximages, yandexmedia,
        yandexmobilebot, yandexnews, yandexrenderresourcesbot, yandexscreenshotbot, yandexvideo,
        yandexwebmaster, yeti, yisouspider, youdaobot
    """,
    # Programs made with an HTTP library, and command-line tools.
    "script": """
        ^ahc, aiohttp, apache-httpasyncclient, apache-httpclient, apachebench, ^artillery,
        ^autocannon, ^axios, ^bombardier, ^bun, colly, ^cpp-httplib, crawler4j, ^curl, ^dart,
        ^deno, ^elixir, ^faraday, ^fasthttp, ^gatling, go-http-client, go-resty, ^got,
        grequests, guzzlehttp, ^hackney, ^hey, ^http.rb, httpie, ^httpx, httrack, ^hyper,
        insomnia, jakarta commons-httpclient, ^java, ^java-http-client, ^jersey, ^jmeter, ^k6,
        libcurl, libwww-perl, ^locust, lua-resty-http, lwp-request, lwp-trivial, mechanize,
        ^newspaper, ^node, node-fetch, node-superagent, ^oha, ^okhttp, pcore-http, ^perl, ^php,
        ^postmanruntime, powershell, pycurl, ^python, python-httpx, python-requests,
        python-urllib, python-urllib3, ^reqwest, rest-client, restsharp, ^ruby, ^rust, scrapy,
        ^siege, sindresorhus/got, ^symfony, ^testclient, trafilatura, ^typhoeus, ^undici,
        unirest-java, ^ureq, ^vegeta, ^werkzeug, ^wget, windowspowershell, winhttp, ^wrk
    """,
}

KINDS = ("human", *_NAMES, "other-bot")
"""Every kind of client there is."""


def kind_of(user_agent: str) -> str:
    """Return which of `KINDS` a User-Agent header belongs to.

    A known name decides; else isbot's patterns tell a bot from a person.
    """
    lower = user_agent.lower().strip()
    if not lower:
        return "other-bot"
    return _named(lower) or ("other-bot" if _looks_like_a_bot(lower) else "human")


# Compiled at first use, by the worker: importing the package stays cheap.


@cache
def _names() -> tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]:
    kinds: dict[str, str] = {}
    for kind, text in _NAMES.items():
        for name in text.split(","):
            kinds[" ".join(name.split())] = kind
    anywhere = _any_of(name for name in kinds if name[0] != "^")
    leading = _any_of(name[1:] for name in kinds if name[0] == "^")
    return (
        kinds,
        re.compile(f"{leading}(?![a-z0-9])"),
        re.compile(f"(?<![a-z0-9]){anywhere}(?![a-z0-9])"),
    )


def _any_of(names: Iterable[str]) -> str:
    """Return an expression for any of the names, the longest that fits.

    By first letter: `re` tries the branches one by one, and so has fewer to try.
    """
    by_letter: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        by_letter.setdefault(name[0], []).append(re.escape(name[1:]))
    letters = (f"{letter}(?:{'|'.join(rests)})" for letter, rests in by_letter.items())
    return f"(?:{'|'.join(letters)})"


def _named(lower: str) -> str | None:
    kinds, leading, anywhere = _names()
    found = [kinds[name] for name in anywhere.findall(lower)]
    if first := leading.match(lower):
        found.append(kinds["^" + first[0]])
    return min(found, key=KINDS.index, default=None)


@cache
def _bot_patterns() -> tuple[tuple[str, ...], re.Pattern[str], re.Pattern[str]]:
    text = (resources.files(__package__) / "bots.txt").read_text("ascii")
    literals, leading, anywhere = [], [], []
    for pattern in text.splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("^"):
            leading.append(pattern)
        elif re.fullmatch(r"(?:[^\\^$.|?*+()\[\]{}]|\\\W)+", pattern, re.ASCII):
            literals.append(re.sub(r"\\(\W)", r"\1", pattern))
        else:
            anywhere.append(pattern)
    # Apart, as one expression of all would be tried at every position. Text and patterns are lower
    # case, so that IGNORECASE is not needed.
    return (
        tuple(literals),
        re.compile("|".join(leading), re.ASCII),
        re.compile("|".join(anywhere), re.ASCII),
    )


def _looks_like_a_bot(lower: str) -> bool:
    # Apps for Android name the library after themselves, as apps for iOS name CFNetwork; isbot
    # sees its "http". A header that begins with it is a script's, by its name.
    lower = lower.replace("okhttp", "")
    literals, leading, anywhere = _bot_patterns()
    return (
        any(literal in lower for literal in literals)
        or leading.match(lower) is not None
        or anywhere.search(lower) is not None
    )
