#!/usr/bin/perl
# nightly_report.pl: holds a night's figures against the claims, the nights before and the last release, says what is worse, and draws the report.
#
#   scripts/nightly_report.pl [--release FILE] [--html FILE] scripts/claims.tsv NIGHT/results.json [EARLIER/results.json…]
#
# Earlier nights come newest first; a figure is compared with the newest of them that has it at the same size (and on the same machine, where its claim says
# so). The status is 0 where nothing is worse, 1 where something is, 2 where a file cannot be read. Needs perl-base alone. Text is handled as bytes.
use strict;
use warnings;

sub fail { print STDERR "nightly_report.pl: @_\n"; exit 2 }

# ---- reading ----

# json TEXT NAME: what the text holds; null is undef, true and false are 1 and 0
sub json {
    my ($text, $name) = @_;
    my $value;
    my $wrong = sub { fail("$name is not JSON at byte " . (pos($text) || 0)) };
    $value = sub {
        $text =~ /\G\s+/gc;
        if ($text =~ /\G\{\s*/gc) {
            my %object;
            return \%object if $text =~ /\G\}/gc;
            while (1) {
                $text =~ /\G\s*"((?:[^"\\]|\\.)*)"\s*:/gc or $wrong->();
                my $key = $1;
                $object{$key} = $value->();
                next if $text =~ /\G\s*,/gc;
                return \%object if $text =~ /\G\s*\}/gc;
                $wrong->();
            }
        }
        if ($text =~ /\G\[\s*/gc) {
            my @list;
            return \@list if $text =~ /\G\]/gc;
            while (1) {
                push @list, $value->();
                next if $text =~ /\G\s*,/gc;
                return \@list if $text =~ /\G\s*\]/gc;
                $wrong->();
            }
        }
        if ($text =~ /\G"((?:[^"\\]|\\.)*)"/gc) {
            my $string = $1;
            $string =~ s/\\(.)/$1/g;
            return $string;
        }
        return $1 + 0 if $text =~ /\G(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)/gc;
        return undef if $text =~ /\Gnull/gc;
        return $1 eq 'true' ? 1 : 0 if $text =~ /\G(true|false)/gc;
        $wrong->();
    };
    my $all = $value->();
    $text =~ /\G\s*\z/gc or $wrong->();
    return $all;
}

sub read_file {
    my ($name) = @_;
    open my $file, '<', $name or fail("cannot read $name: $!");
    local $/;
    my $text = <$file>;
    return $text;
}

# night FILE: its results, with figures by metric and parts by name
sub night {
    my ($name) = @_;
    my $night = json(read_file($name), $name);
    ref $night eq 'HASH' && ref $night->{figures} eq 'ARRAY' && ref $night->{parts} eq 'ARRAY' or fail("$name is not the results of a night");
    $night->{metric} = { map { $_->{metric} => $_ } @{ $night->{figures} } };
    $night->{part} = { map { $_->{name} => $_ } @{ $night->{parts} } };
    return $night;
}

my ($release_file, $html);
while (@ARGV && $ARGV[0] =~ /^-/) {
    my $option = shift;
    if ($option eq '--help') {
        print map { s/^# ?//r } grep { /^#( |$)/ } split /^/, read_file($0) =~ s/\nuse strict.*//sr;
        exit 0;
    }
    $option =~ /^--(release|html)$/ or fail("unknown option '$option'; allowed: --release FILE, --html FILE");
    @ARGV or fail("$option needs a file");
    ($option eq '--html' ? $html : $release_file) = shift;
}
@ARGV >= 2 or fail('claims and results are needed: scripts/nightly_report.pl scripts/claims.tsv NIGHT/results.json');
my ($claims_file, $now_file, @earlier_files) = @ARGV;

# sections of the claims, their headings, and their names in one line
my @sections = (['paper', 'Claims of the paper', 'claims of the paper'], ['open', 'What the paper leaves open', 'what it leaves open'],
    ['ours', 'Beside them: what is not to become worse', 'ours beside them']);
my @columns = qw(id section claim paper metric held must change command reason);
my (@claims, $headed);
for my $line (split /\n/, read_file($claims_file)) {
    next if $line =~ /^(#.*)?$/;
    my @fields = split /\t/, $line, -1;
    @fields == @columns or fail("$claims_file: " . @fields . " columns in place of " . @columns . ": $line");
    if (!$headed) { $headed = 1; next }
    my %claim;
    @claim{@columns} = @fields;
    grep { $_->[0] eq $claim{section} } @sections or fail("$claims_file: $claim{id}: there is no section '$claim{section}'");
    for my $rule (@claim{qw(held must)}) {
        $rule =~ /^(-|(abs )?(>=|<=|=) \S+)$/ or fail("$claims_file: $claim{id}: '$rule' is no condition, such as `>= 39.1`");
    }
    $claim{change} =~ /^(-|(higher|lower) [\d.]+%?( machine)?)$/ or fail("$claims_file: $claim{id}: '$claim{change}' is no change, such as `higher 2%`");
    push @claims, \%claim;
}
my $now = night($now_file);
my @earlier = map { night($_) } @earlier_files;
my $release = defined $release_file ? night($release_file) : undef;

# ---- comparing ----

sub number { # as few digits as say it
    my ($x) = @_;
    return 'none' unless defined $x;
    my $size = abs $x;
    my $text = $x == int $x && $size < 1e6 ? sprintf '%d', $x : $size >= 1000 ? sprintf '%.0f', $x : $size >= 100 ? sprintf '%.1f', $x : $size >= 1 ? sprintf '%.2f', $x : sprintf '%.4g', $x;
    return $text;
}

sub shown { # a figure with its unit
    my ($value, $unit) = @_;
    return $value ? 'yes' : 'no' if $unit eq 'yes or no';
    return number($value) . ($unit eq '' ? '' : " $unit");
}

# holds RULE VALUE: 1, 0, or undef where the metric it names was not measured
sub holds {
    my ($rule, $value) = @_;
    my ($abs, $sign, $bound) = $rule =~ /^(abs )?(>=|<=|=) (\S+)$/ or return undef;
    if ($bound !~ /^-?[\d.]+$/) {
        $bound = $now->{metric}{$bound} && $now->{metric}{$bound}{value};
        return undef unless defined $bound;
    }
    $value = abs $value if $abs;
    return ($sign eq '>=' ? $value >= $bound : $sign eq '<=' ? $value <= $bound : $value == $bound) ? 1 : 0;
}

# like FIGURE NIGHT MACHINE: that night's figure, where the two may be compared
sub like {
    my ($figure, $night, $machine) = @_;
    my $other = $night->{metric}{ $figure->{metric} };
    return undef unless $other && defined $other->{value} && $other->{scale} eq $figure->{scale} && $other->{kind} eq $figure->{kind};
    my $which = $figure->{metric} =~ /^gpu\./ ? 'gpu' : 'machine';
    return undef if $machine && $night->{$which} ne $now->{$which};
    return $other;
}

# compared CLAIM FIGURE NIGHT WHAT: the change in words, its sign (-1 worse than allowed, 1 better by as much, 0), or nothing
sub compared {
    my ($claim, $figure, $night, $what) = @_;
    my ($better, $most, $percent, $machine) = $claim->{change} =~ /^(higher|lower) ([\d.]+)(%?)( machine)?$/ or return;
    my $other = $night && like($figure, $night, $machine) or return;
    my ($new, $old) = ($figure->{value}, $other->{value});
    # what is to hold in size, such as a difference of losses, is compared in size
    my ($a, $b) = $claim->{held} =~ /^abs/ ? (abs $new, abs $old) : ($new, $old);
    my $change = $a - $b;
    my $room = $percent ? $most / 100 * abs $b : $most;
    my $gain = $better eq 'higher' ? $change : -$change;
    my $sign = $gain < -$room - 1e-9 * abs $b ? -1 : $gain > $room + 1e-9 * abs $b ? 1 : 0;
    my $words =
        $figure->{unit} eq 'yes or no' ? ($new == $old ? 'as before' : 'was ' . shown($old, $figure->{unit}))
      : $new == $old ? 'the same'
      : sprintf('%s after %s%s', number($new), number($old), $old != 0 && $percent ? sprintf(' (%+.1f %%)', 100 * ($new / $old - 1)) : '');
    return { words => $words, sign => $sign, of => $what, allowed => $most . ($percent ? ' %' : '') };
}

my (@worse, %count);
for my $part (@{ $now->{parts} }) {
    push @worse, "part $part->{name} failed: $part->{why}" if $part->{status} eq 'failed';
}
for my $claim (@claims) {
    my $figure = $claim->{metric} eq '-' ? undef : $now->{metric}{ $claim->{metric} };
    my $part_name = $claim->{metric} =~ /^soak\.(\w+)\./ ? "soak_$1" : $claim->{metric} =~ /^(\w+)\./ ? $1 : '';
    my $part = $now->{part}{$part_name};
    if (!$figure || !defined $figure->{value}) {
        $claim->{verdict} = 'not measured';
        $claim->{why} =
            $claim->{metric} eq '-' ? $claim->{reason}
          : $figure && $figure->{note} ne '' ? $figure->{note}
          : !$part ? "part $part_name was not run"
          : $part->{status} eq 'done' ? "part $part_name does not measure it at this size ($part->{settings})"
          : "part $part_name: $part->{why}";
        # what was measured at this very size and is no more
        if ($part && $part->{status} eq 'done') {
            for my $night (grep { defined } @earlier, $release) {
                my $old = $night->{metric}{ $claim->{metric} };
                next unless $old && defined $old->{value} && $night->{part}{$part_name} && $night->{part}{$part_name}{settings} eq $part->{settings};
                $claim->{red} = 1;
                push @worse, "$claim->{id}: $claim->{claim}: no longer measured ($claim->{metric}), as in night $night->{night}";
                last;
            }
        }
        $count{ $claim->{section} }{'not measured'}++;
        next;
    }
    $claim->{figure} = $figure;
    my $held = holds($claim->{held}, $figure->{value});
    $claim->{verdict} = $claim->{held} eq '-' || !defined $held ? ($figure->{kind} eq 'planned' ? 'planned only' : 'figure') : $held ? 'held' : 'NOT held';
    $count{ $claim->{section} }{ $claim->{verdict} }++;
    my $what = "$claim->{id}: $claim->{claim}";
    my $value = shown($figure->{value}, $figure->{unit});
    my $must = holds($claim->{must}, $figure->{value});
    if (defined $must && !$must) {
        $claim->{red} = 1;
        my $bound = $claim->{must} =~ s/^abs /in size /r;
        push @worse, "$what: $value, must be $bound";
    }
    for my $night (@earlier) {
        last if $claim->{last} = compared($claim, $figure, $night, $night->{night});
    }
    $claim->{release} = compared($claim, $figure, $release, $release && $release->{night});
    for my $which (qw(last release)) {
        my $change = $claim->{$which} or next;
        next if $change->{sign} >= 0;
        $claim->{red} = 1;
        push @worse, "$what: $change->{words}, " . ($which eq 'last' ? "night $change->{of}" : "the release ($change->{of})")
          . ($figure->{unit} eq 'yes or no' ? '' : "; allowed: $change->{allowed} worse");
    }
}

my @order = ('held', 'NOT held', 'planned only', 'figure', 'not measured');
for (@sections) {
    my ($section, undef, $name) = @$_;
    my $all = 0;
    $all += $_ for values %{ $count{$section} };
    printf "%s: %d lines: %s\n", $name, $all,
      join(', ', map { "$count{$section}{$_} $_" } grep { $count{$section}{$_} } @order);
}
print "worse: $_\n" for @worse;
print @worse ? (@worse == 1 ? "1 line is worse\n" : @worse . " lines are worse\n") : "nothing is worse\n";

# ---- the report ----

sub escaped {
    my ($text) = @_;
    $text =~ s/&/&amp;/g;
    $text =~ s/</&lt;/g;
    $text =~ s/>/&gt;/g;
    $text =~ s/"/&quot;/g;
    return $text;
}

sub command { # breaks between words only, as a dash is no place to part a flag
    my ($text) = @_;
    return '<code>' . join(' ', map { length > 36 ? escaped($_) : '<span>' . escaped($_) . '</span>' } split / /, $text) . '</code>';
}

# Okabe and Ito's colours, which colour-blind people can tell apart
my @colours = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9');

sub marks { # round numbers between two
    my ($low, $high) = @_;
    my $raw = ($high - $low) / 4;
    my $unit = 10**int(log($raw) / log(10) - ($raw < 1 ? 1 : 0));
    my ($step) = grep { $_ >= $raw } map { $unit * $_ } 1, 2, 2.5, 5, 10, 20;
    my @marks;
    for (my $i = int($low / $step) - 1; $i * $step <= $high + 1e-9 * $step; $i++) { push @marks, $i * $step if $i * $step >= $low - 1e-9 * $step }
    return @marks;
}

# plot TITLE SERIES…: an SVG, 360 wide so that on a phone its letters are as large as the text's. Words along x: bars, or points if there is one series;
# numbers, or words that are numbers: lines.
sub plot {
    my ($title, @series) = @_;
    my @words;
    my %place;
    for my $series (@series) {
        for my $point (@{ $series->{points} }) { push @words, $point->[0] unless $place{ $point->[0] }++ }
    }
    my $named = grep { !/^-?[\d.]+(e[-+]?\d+)?$/ } @words;
    my $categories = $named || @words <= 12;
    my $bars = $named && @series > 1;
    my @ys = map { $_->[1] } map { @{ $_->{points} } } @series;
    my ($low, $high) = (sort { $a <=> $b } @ys)[0, -1];
    $low = 0 if $bars || ($low > 0 && $low < $high / 3);
    my $room = ($high - $low || abs($high) || 1) * 0.06;
    $high += $room;
    $low -= $room if $low != 0;
    my ($left, $right, $top, $bottom) = (44, 352, 34, 210);
    $top += 16 if @series > 1;
    my $sy = sub { sprintf '%.1f', $bottom - ($_[0] - $low) / ($high - $low) * ($bottom - $top) };
    my $slot = ($right - $left) / (@words || 1);
    my (%at, $sx, $first, $last);
    if ($categories) {
        $at{ $words[$_] } = $left + $slot * ($_ + 0.5) for 0 .. $#words;
        $sx = sub { sprintf '%.1f', $at{ $_[0] } };
    } else {
        ($first, $last) = (sort { $a <=> $b } @words)[0, -1];
        $last = $first + 1 if $last == $first;
        $sx = sub { sprintf '%.1f', $left + ($_[0] - $first) / ($last - $first) * ($right - $left) };
    }
    my $svg = qq(<figure><svg viewBox="0 0 360 246" role="img" aria-label=") . escaped($title) . qq("><text class="title" x="4" y="16">) . escaped($title) . "</text>\n";
    if (@series > 1) {
        my $x = $left;
        for my $i (0 .. $#series) {
            $svg .= sprintf qq(<rect x="%d" y="28" width="10" height="10" fill="%s"/><text x="%d" y="37">%s</text>\n), $x, $colours[$i % @colours], $x + 13, escaped($series[$i]{series});
            $x += 26 + 7 * length $series[$i]{series};
        }
    }
    for my $mark (marks($low, $high)) {
        my $y = $sy->($mark);
        $svg .= qq(<path class="grid" d="M$left ${y}H$right"/><text x="40" y=") . ($y + 4) . qq(" text-anchor="end">) . ($mark >= 10000 ? number($mark / 1000) . 'k' : 0 + sprintf('%.6g', $mark)) . "</text>\n";
    }
    my @below = $categories ? @words : marks($first, $last);
    # words that would touch stand in two rows, and what would be cut at the edge ends there
    my $rows = $categories && grep({ 7 * length($_) + 4 > $slot } @words) ? 2 : 1;
    for my $i (0 .. $#below) {
        my $x = $sx->($below[$i]);
        my ($anchor, $at) = $x + 3.5 * length($below[$i]) > 358 ? ('end', 358) : ('middle', $x);
        $svg .= qq(<text x="$at" y=") . (226 + 14 * ($i % $rows)) . qq(" text-anchor="$anchor">) . escaped($below[$i]) . "</text>\n";
    }
    for my $i (0 .. $#series) {
        my $colour = $colours[$i % @colours];
        my @points = @{ $series[$i]{points} };
        if ($bars) {
            my $width = 0.8 * $slot / @series;
            for my $point (@points) {
                my ($x, $y) = ($at{ $point->[0] } - 0.4 * $slot + $i * $width, $sy->($point->[1]));
                $svg .= sprintf qq(<rect x="%.1f" y="%s" width="%.1f" height="%.1f" fill="%s"><title>%s, %s: %s</title></rect>\n), $x, $y, $width - 1, $bottom - $y, $colour,
                  escaped($series[$i]{series}), escaped($point->[0]), number($point->[1]);
            }
            next;
        }
        $svg .= qq(<path class="line" stroke="$colour" d="M) . join('L', map { $sx->($_->[0]) . ' ' . $sy->($_->[1]) } @points) . qq("/>\n) unless $named;
        if (@points <= 12) {
            $svg .= sprintf qq(<circle cx="%s" cy="%s" r="3" fill="%s"><title>%s</title></circle>\n), $sx->($_->[0]), $sy->($_->[1]), $colour, number($_->[1]) for @points;
        }
    }
    return $svg . qq(<path class="axis" d="M$left ${top}V${bottom}H$right"/></svg></figure>\n);
}

exit(@worse ? 1 : 0) unless defined $html;

my %class = ('held' => 'good', 'NOT held' => 'odd', 'planned only' => 'plain', 'figure' => 'plain', 'not measured' => 'grey');
my $style = <<'CSS';
:root{--ink:#1b1b1b;--soft:#5a5a5a;--line:#d8d8d8;--back:#fff;--card:#f6f6f6;--good:#0a6b3d;--odd:#8a5200;--bad:#b3161b;--badback:#fdeaea}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--soft:#a8a8a8;--line:#444;--back:#161616;--card:#202020;--good:#5fc795;--odd:#e2a857;--bad:#ff8a8a;--badback:#3a1a1b}}
*{box-sizing:border-box}body{margin:0 auto;padding:12px;max-width:1400px;font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--back);overflow-wrap:anywhere}
h1{font-size:1.4em;margin:.2em 0}h2{font-size:1.15em;margin:1.6em 0 .5em}p{margin:.4em 0}.soft{color:var(--soft)}
.banner{padding:10px 12px;border-left:6px solid var(--good);background:var(--card)}.banner.bad{border-color:var(--bad);background:var(--badback)}.banner ul{margin:.4em 0;padding-left:1.2em}
table{border-collapse:collapse;width:100%}th,td{text-align:left;vertical-align:top;padding:6px 8px;border-bottom:1px solid var(--line)}th{font-size:.9em;color:var(--soft);white-space:nowrap}
code{font:12px/1.4 ui-monospace,monospace}code span{white-space:nowrap}summary{cursor:pointer;padding:6px 0}.note{font-size:.87em;color:var(--soft)}.good{color:var(--good)}.odd{color:var(--odd)}.bad{color:var(--bad);font-weight:600}.grey{color:var(--soft)}
tr.red{background:var(--badback)}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:12px}figure{margin:0;max-width:520px}svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg .title{font-weight:600}.grid{stroke:var(--line)}.axis{stroke:var(--soft);fill:none}.line{fill:none;stroke-width:2}
td.claim{width:22%}td.paper{width:11%}.took{white-space:nowrap}nav a{color:inherit;margin-right:14px}td.cmd{width:17%}
@media(max-width:800px){thead{display:none}table,tbody,tr,td{display:block;width:100%}td.claim,td.cmd,td.paper{width:100%}tr{border:1px solid var(--line);border-radius:6px;margin:0 0 10px;padding:4px 0}td{border:0;padding:3px 10px}
td.claim{font-weight:600}td:empty{display:none}td[data-as]::before{content:attr(data-as) ": ";color:var(--soft);font-size:.87em}}
CSS

my @reds = @worse;
my $page = "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\"><title>"
  . (@reds ? 'Worse' : 'Well') . ": night $now->{night}</title>\n<style>\n$style</style></head><body>\n";
$page .= "<h1>train_gpt_fp8, night of $now->{night}</h1>\n<p class=\"soft\">commit " . escaped($now->{commit}) . "; " . escaped($now->{machine}) . "; GPU: " . escaped($now->{gpu}) . "; $now->{began} to $now->{ended}"
  . ($now->{budget} ne '' ? "; budget $now->{budget}" : '; no budget') . "</p>\n"
  . "<nav><a href=\"#paper\">the paper</a><a href=\"#open\">open</a><a href=\"#ours\">ours</a><a href=\"#plots\">plots</a><a href=\"#parts\">parts</a></nav>\n";
if (@reds) {
    $page .= '<div class="banner bad"><b class="bad">' . (@reds == 1 ? '1 line is worse' : @reds . ' lines are worse') . "</b><ul>\n" . join('', map { '<li>' . escaped($_) . "</li>\n" } @reds) . "</ul></div>\n";
} else {
    $page .= "<div class=\"banner\"><b class=\"good\">Nothing is worse</b> than " . (@earlier ? "the nights before" : 'a night before, of which there is none yet') . ($release ? " and the last release ($release->{night})" : '; there is no release to compare with') . ".</div>\n";
}

my @smaller = grep { $_->{status} eq 'cut' || ($_->{status} ne 'skipped' && $_->{settings} ne $_->{largest}) } @{ $now->{parts} };
if (@smaller) {
    $page .= "<h2>What was cut</h2>\n<ul>\n";
    for my $part (@smaller) {
        $page .= '<li><b>' . escaped($part->{name}) . '</b>: '
          . escaped($part->{status} eq 'cut' ? "not run: $part->{why}" : "$part->{settings} in place of " . ($part->{largest} eq '' ? 'all' : $part->{largest})) . "</li>\n";
    }
    $page .= "</ul>\n";
}

sub change_cell {
    my ($change, $newest) = @_;
    return '' unless $change;
    return '<span class="' . ($change->{sign} < 0 ? 'bad' : $change->{sign} > 0 ? 'good' : 'soft') . '">' . ($change->{sign} < 0 ? 'worse: ' : '') . escaped($change->{words}) . '</span>'
      . ($newest && $change->{of} ne $newest ? " <span class=\"note\">(night $change->{of})</span>" : '');
}

sub row { # of a claim
    my ($claim, $paper) = @_;
    my $figure = $claim->{figure};
    my $ours = $figure
      ? '<b>' . escaped(shown($figure->{value}, $figure->{unit})) . "</b>, $figure->{kind}" . ($figure->{note} ne '' ? '<br><span class="note">' . escaped($figure->{note}) . '</span>' : '')
      . ($figure->{scale} ne '' ? '<br><span class="note">' . escaped($figure->{scale}) . '</span>' : '')
      : '<span class="grey">not measured: ' . escaped($claim->{why}) . '</span>';
    my $verdict = $claim->{verdict} eq 'figure' ? '' : $claim->{verdict};
    my $because = $claim->{verdict} eq 'planned only' && $claim->{reason} ne '-' ? '<br><span class="note">' . escaped($claim->{reason}) . '</span>' : '';
    my $row = '<tr id="' . escaped($claim->{id}) . '"' . ($claim->{red} ? ' class="red"' : '') . '><td class="claim">' . escaped($claim->{claim}) . '</td>'
      . ($paper ? '<td class="paper" data-as="The paper">' . escaped($claim->{paper}) . '</td>' : '')
      . '<td data-as="Ours">' . $ours . '</td>'
      . ($verdict eq '' && !$claim->{red} ? '<td></td>' : '<td data-as="Verdict"><span class="' . ($class{ $claim->{verdict} }) . "\">$verdict</span>" . ($claim->{red} ? ' <span class="bad">worse</span>' : '') . $because . '</td>');
    for my $which (['last', 'Last night', @earlier ? $earlier[0]{night} : ''], ['release', 'Release', '']) {
        my $cell = change_cell($claim->{ $which->[0] }, $which->[2]);
        $row .= $cell eq '' ? '<td></td>' : "<td data-as=\"$which->[1]\">$cell</td>";
    }
    return $row . ($claim->{command} eq '-' ? '<td class="cmd"></td>' : '<td class="cmd" data-as="Command">' . command($claim->{command}) . '</td>') . "</tr>\n";
}

for my $section (@sections) {
    $page .= "<h2 id=\"$section->[0]\">$section->[1]</h2>\n<p class=\"soft\">" . join(', ', map { "$count{$section->[0]}{$_} $_" } grep { $count{ $section->[0] }{$_} } @order) . "</p>\n";
    my $paper = $section->[0] ne 'ours';
    my $head = '<table><thead><tr><th>Claim</th>' . ($paper ? '<th>The paper</th>' : '') . '<th>Ours</th><th>Verdict</th><th>Last night</th><th>Release</th><th>Command</th></tr></thead><tbody>' . "\n";
    # Of ours what was not measured is folded away
    my (@rows, @folded);
    for my $claim (grep { $_->{section} eq $section->[0] } @claims) {
        push @{ $paper || $claim->{red} || $claim->{figure} ? \@rows : \@folded }, row($claim, $paper);
    }
    $page .= $head . join('', @rows) . "</tbody></table>\n" if @rows;
    $page .= '<details><summary>' . (@folded == 1 ? '1 line was' : @folded . ' lines were') . " not measured</summary>\n$head" . join('', @folded) . "</tbody></table></details>\n" if @folded;
}

my (@titles, %plots);
for my $series (@{ $now->{series} || [] }) {
    next unless @{ $series->{points} };
    push @titles, $series->{plot} unless $plots{ $series->{plot} };
    push @{ $plots{ $series->{plot} } }, $series;
}
$page .= "<h2 id=\"plots\">Plots</h2>\n<div class=\"plots\">\n" . join('', map { plot($_, @{ $plots{$_} }) } @titles) . "</div>\n" if @titles;

$page .= "<h2 id=\"parts\">Parts</h2>\n<table><thead><tr><th>Part</th><th>State</th><th>Took</th><th>Size</th><th>Raw output</th></tr></thead><tbody>\n";
for my $part (@{ $now->{parts} }) {
    my $ran = $part->{status} eq 'done' || $part->{status} eq 'failed';
    $page .= '<tr' . ($part->{status} eq 'failed' ? ' class="red"' : '') . '><td class="claim">' . escaped($part->{name}) . '</td><td data-as="State"><span class="'
      . ($part->{status} eq 'done' ? 'good' : $part->{status} eq 'failed' ? 'bad' : 'grey') . "\">$part->{status}</span>" . ($part->{why} ne '' ? ': ' . escaped($part->{why}) : '') . '</td>'
      . ($ran ? sprintf('<td class="took" data-as="Took">%d min %02d s</td>', $part->{seconds} / 60, $part->{seconds} % 60) : '<td></td>')
      . ($part->{settings} ne '' ? '<td data-as="Size">' . escaped($part->{settings}) . '</td>' : '<td></td>')
      . ($ran ? '<td data-as="Raw output">' . command("parts/$part->{name}/output.txt") . '</td>' : '<td></td>') . "</tr>\n";
}
$page .= "</tbody></table>\n<p class=\"soft\">held: ours meets the figure of the paper. NOT held: it does not; a result, red only where it must hold or held before. planned: computed by --plan, which tests hold against what runs take, not run at that size."
  . " worse: by more than is allowed in scripts/claims.tsv, against the newest night (or release) with the same size and, for speeds, the same machine.</p>\n</body></html>\n";
open my $file, '>', $html or fail("cannot write $html: $!");
print {$file} $page or fail("cannot write $html: $!");
close $file or fail("cannot write $html: $!");
exit(@worse ? 1 : 0);
