// Draws one dashboard of data.json (made by draw.py) with Grafana's own components: what a running
// Grafana does between the answers of Prometheus and the picture, in as few lines as possible.
// Not in @grafana/ui, so only sketched: heatmap, geomap. They say so.
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';
import '@fontsource/roboto-mono/400.css';
import {
  type DataFrame, type DisplayValue, type Field, type FieldDisplay, FieldType, Registry, ThemeContext,
  applyFieldOverrides, cacheFieldDisplayNames, createDataFrame, createTheme, dateTime, formattedValueToString,
  getDisplayValueAlignmentFactors, getFieldDisplayValues, getValueFormat, outerJoinDataFrames, standardTransformers,
  standardTransformersRegistry, transformDataFrame,
} from '@grafana/data';
import { BarGauge, BigValue, EventsCanvas, GlobalStyles, PanelChrome, TimeSeries, VizRepeater } from '@grafana/ui';
import { TableNG } from '@grafana/ui/unstable';
import { type ReactNode, useEffect, useRef, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { lastValueFrom } from 'rxjs';
import { feature } from 'topojson-client';
import land from 'world-atlas/land-110m.json';
import countries from 'world-countries/countries.json';

type Labels = Record<string, string>;
type Series = { metric: Labels; values: Array<[number, string | null]> };
type Answer = { refId: string; expr: string; format: string; legend: string; series: Series[];
  exemplars: Array<{ timestamp: number; value: string }> };
type Drawn = { panel: any; left: number; top: number; width: number; height: number; answers: Answer[] };
type Page = { title: string; from: number; to: number; step: number; variables: Labels; words: Labels;
  panels: Drawn[]; width: number; height: number };

const theme = createTheme({ colors: { mode: 'dark' } });
standardTransformersRegistry.setInit(() =>
  [...new Set(Object.values(standardTransformers) as any[])].map((t) => ({ ...t, transformation: () => t })));

// ---- Answers of Prometheus as data frames, as Grafana's data source makes them.

function name(answer: Answer, labels: Labels): string | undefined {
  if (answer.legend === '__auto') {
    return Object.keys(labels).length ? undefined : answer.expr;
  }
  return answer.legend.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, label) => labels[label] ?? '');
}

function seriesFrames(answer: Answer, step: number): DataFrame[] {
  const frames = answer.series.map(({ metric, values }) => createDataFrame({
    refId: answer.refId,
    fields: [
      { name: 'Time', type: FieldType.time, config: { interval: step * 1000 }, values: values.map(([at]) => at * 1000) },
      { name: 'Value', type: FieldType.number, labels: metric, config: { displayNameFromDS: name(answer, metric) },
        values: values.map(([, value]) => (value === null || /Inf|NaN/.test(value) ? null : Number(value))) },
    ],
  }));
  return frames.length ? frames : [createDataFrame({ refId: answer.refId, fields: [] })];
}

function tableFrame(answer: Answer, several: boolean): DataFrame {
  const labels = [...new Set(answer.series.flatMap(({ metric }) => Object.keys(metric).sort()))];
  return createDataFrame({
    refId: answer.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: answer.series.map(({ values }) => values[0][0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, config: { filterable: true },
        values: answer.series.map(({ metric }) => metric[label] ?? '') })),
      { name: several ? `Value #${answer.refId}` : 'Value', type: FieldType.number,
        values: answer.series.map(({ values }) => Number(values[0][1])) },
    ],
  });
}

async function framesOf(page: Page, { panel, answers }: Drawn): Promise<DataFrame[]> {
  const tables = answers.filter(({ format }) => format === 'table');
  const empty = tables.length > 0 && answers.every(({ series }) => !series.length);
  const raw = empty ? [] : answers.flatMap((answer) =>
    answer.format === 'table' ? [tableFrame(answer, tables.length > 1)] : seriesFrames(answer, page.step));
  const changed = await lastValueFrom(transformDataFrame(panel.transformations ?? [], raw));
  const made = applyFieldOverrides({
    data: changed, fieldConfig: fieldConfig(panel), fieldConfigRegistry: registry(panel), theme, timeZone: 'utc',
    replaceVariables: (text) => filled(page, text),
  });
  cacheFieldDisplayNames(made);
  return made;
}

function filled(page: Page, text: string): string {
  return text.replace(/\$\{?(\w+)(?::\w+)?\}?/g, (all, variable) => page.words[variable] ?? all);
}

// ---- The panel's settings over those that each kind of panel has by itself.

const CUSTOM: Record<string, any> = {
  timeseries: { drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none',
    pointSize: 5, showPoints: 'auto', spanNulls: false, axisPlacement: 'auto', axisColorMode: 'text',
    scaleDistribution: { type: 'linear' }, stacking: { mode: 'none', group: 'A' }, thresholdsStyle: { mode: 'off' },
    barAlignment: 0, barWidthFactor: 0.6 },
  table: { align: 'auto', cellOptions: { type: 'auto' }, inspect: false },
};

function fieldConfig(panel: any): any {
  const { defaults = {}, overrides = [] } = panel.fieldConfig ?? {};
  const from = (thresholds: any) => thresholds && { ...thresholds,
    steps: thresholds.steps.map((step: any) => ({ ...step, value: step.value ?? -Infinity })) };
  return {
    defaults: {
      color: { mode: panel.type === 'timeseries' ? 'palette-classic' : 'thresholds' },
      ...defaults,
      thresholds: from(defaults.thresholds ?? { mode: 'absolute', steps: [{ color: 'green' }, { value: 80, color: 'red' }] }),
      custom: { ...CUSTOM[panel.type], ...defaults.custom },
    },
    overrides: overrides.map(({ matcher, properties }: any) => ({ matcher, properties: properties.map((property: any) =>
      (property.id === 'thresholds' ? { ...property, value: from(property.value) } : property)) })),
  };
}

function registry(panel: any): any {
  const { defaults, overrides } = fieldConfig(panel);
  const ids = new Set(['displayName', 'unit', 'min', 'max', 'decimals', 'color', 'thresholds', 'mappings', 'links',
    'noValue', 'description', ...Object.keys(defaults.custom).map((key) => `custom.${key}`),
    ...overrides.flatMap(({ properties }: any) => properties.map(({ id }: any) => id))]);
  return new Registry(() => [...ids].map((id) => ({ id, name: id, path: id.replace(/^custom\./, ''),
    isCustom: id.startsWith('custom.'), process: (value: any) => value, shouldApply: () => true })) as any);
}

// ---- Kinds of panels.

type Props = { page: Page; drawn: Drawn; frames: DataFrame[]; width: number; height: number };

function Panel(props: Props): ReactNode {
  const { panel } = props.drawn;
  const Kind = { timeseries: Lines, stat: Stat, bargauge: Bars, table: Grid, heatmap: Heat, geomap: World }[panel.type as string];
  if (!Kind) {
    return <Sketch>No component for a panel of type {panel.type}</Sketch>;
  }
  const nothing = !props.frames.some((frame) => frame.length > 0);
  if (nothing && !['stat', 'bargauge', 'geomap'].includes(panel.type)) {
    return <div style={{ height: '100%', display: 'grid', placeItems: 'center', color: theme.colors.text.secondary }}>
      {panel.fieldConfig?.defaults?.noValue ?? 'No data'}</div>;
  }
  return <Kind {...props} />;
}

function Sketch({ children }: { children: ReactNode }): ReactNode {
  return <div style={{ fontSize: 11, fontStyle: 'italic', color: theme.colors.warning.text, height: 16 }}>{children}</div>;
}

function range(page: Page): any {
  const [from, to] = [dateTime(page.from * 1000), dateTime(page.to * 1000)];
  return { from, to, raw: { from, to } };
}

function Lines({ page, drawn, frames, width, height }: Props): ReactNode {
  const made = useRef<any>(null);
  const exemplars = drawn.answers.flatMap((answer) => answer.exemplars);
  const marks = createDataFrame({ fields: [
    { name: 'Time', values: exemplars.map(({ timestamp }) => timestamp * 1000) },
    { name: 'Value', values: exemplars.map(({ value }) => Number(value)) }] });
  // As Grafana joins them; this TimeSeries alone forgets the names, and so the colors by name.
  const join = (all: DataFrame[], { x, y }: any) =>
    outerJoinDataFrames({ frames: all, joinBy: x, keep: y, keepOriginIndices: true, keepDisplayNames: true });
  return <TimeSeries frames={frames.filter((frame) => frame.length)} timeRange={range(page)} timeZone="utc" width={width}
    height={height} preparePlotFrame={join as any} legend={drawn.panel.options.legend} options={drawn.panel.options}>
    {(config: any) => {
      config.addHook('init', (plot: any) => { made.current = plot; });
      const place = (_: DataFrame, row: number) => {
        const plot = made.current;
        const scale = plot.axes[1].scale;
        const [low, high] = [plot.scales[scale].min, plot.scales[scale].max];
        const value = Math.min(Math.max(marks.fields[1].values[row], low), high);
        return { x: plot.valToPos(marks.fields[0].values[row], 'x'), y: plot.valToPos(value, scale) };
      };
      return exemplars.length > 0 && <EventsCanvas id="exemplars" config={config} events={[marks]} mapEventToXYCoords={place}
        renderEventMarker={() => <div style={{ width: 6, height: 6, transform: 'translate(-3px,-3px) rotate(45deg)',
          background: '#5794F2' }} />} />;
    }}
  </TimeSeries>;
}

function values(page: Page, panel: any, frames: DataFrame[], sparkline: boolean): FieldDisplay[] {
  return getFieldDisplayValues({ fieldConfig: fieldConfig(panel), reduceOptions: panel.options.reduceOptions, theme,
    replaceVariables: (text) => filled(page, text), data: frames, sparkline, timeZone: 'utc' });
}

function Stat({ page, drawn: { panel }, frames, width, height }: Props): ReactNode {
  const { options } = panel;
  return <VizRepeater getValues={() => values(page, panel, frames, options.graphMode !== 'none')} autoGrid itemSpacing={3}
    getAlignmentFactors={(all: FieldDisplay[]) => getDisplayValueAlignmentFactors(all)} renderCounter={0} source={frames}
    orientation={options.orientation ?? 'auto'} width={width} height={height}
    renderValue={({ value, alignmentFactors, count, orientation, ...size }: any) => {
      // Grafana 13's sparkline of a single point is an error in BigValue.
      const sparkline = value.sparkline?.x?.values.length > 1 ? { ...value.sparkline, timeRange: range(page) } : undefined;
      return <BigValue value={value.display} count={count} sparkline={sparkline} colorMode={options.colorMode ?? 'value'}
        graphMode={options.graphMode ?? 'area'} justifyMode={options.justifyMode ?? 'auto'} text={options.text}
        textMode={options.textMode ?? 'auto'} alignmentFactors={alignmentFactors} parentOrientation={orientation}
        disableWideLayout={options.wideLayout === false} theme={theme} {...size} />;
    }} />;
}

function Bars({ page, drawn: { panel }, frames, width, height }: Props): ReactNode {
  const { options } = panel;
  const { minVizHeight = 16, maxVizHeight = 300 } = options.sizing === 'manual' ? options : {};
  return <VizRepeater getValues={() => values(page, panel, frames, false)} itemSpacing={10} renderCounter={0} source={frames}
    getAlignmentFactors={(all: FieldDisplay[]) => getDisplayValueAlignmentFactors(all)} minVizHeight={minVizHeight} minVizWidth={8}
    maxVizHeight={maxVizHeight} orientation={options.orientation ?? 'horizontal'} width={width} height={height}
    renderValue={({ value: { display, field, view, colIndex }, alignmentFactors, count, orientation, ...size }: any) => {
      const shown: DisplayValue = count === 1 && !field.displayName ? { ...display, title: undefined } : display;
      return <BarGauge value={shown} field={field} display={view?.getFieldDisplayProcessor(colIndex)} theme={theme}
        alignmentFactors={alignmentFactors} orientation={orientation} displayMode={options.displayMode}
        showUnfilled={options.showUnfilled} valueDisplayMode={options.valueMode} namePlacement={options.namePlacement}
        text={options.text} {...size} />;
    }} />;
}

function Grid({ page, drawn: { panel }, frames, width, height }: Props): ReactNode {
  const more = frames.length > 1 && <Sketch>{frames.length} tables: Grafana shows this one and a menu for the others</Sketch>;
  return <>{more}<TableNG data={frames[0]} width={width} height={height - (more ? 16 : 0)} timeRange={range(page)}
    sortBy={panel.options.sortBy} cellHeight={panel.options.cellHeight} noHeader={panel.options.showHeader === false}
    fieldConfig={fieldConfig(panel)} enableVirtualization={false} /></>;
}

function Heat({ page, frames, width, height }: Props): ReactNode {
  const rows = frames.filter((frame) => frame.length)
    .map(({ fields: [time, value] }) => ({ le: Number(value.labels!.le.replace('+Inf', 'Infinity')),
      counts: new Map(time.values.map((at: number, index: number) => [at, value.values[index] ?? 0])) }))
    .sort((a, b) => a.le - b.le);
  const [wide, high] = [width - 60, height - 36];
  const count = (row: number, at: number) => rows[row].counts.get(at)! - (row ? rows[row - 1].counts.get(at) ?? 0 : 0);
  const times = [...(rows.at(-1)?.counts.keys() ?? [])];
  const most = Math.max(...rows.flatMap((_, row) => times.map((at) => count(row, at))));
  const x = (at: number) => 56 + wide * (at / 1000 - page.from) / (page.to - page.from);
  const seconds = (le: number) => (Number.isFinite(le) ? formattedValueToString(getValueFormat('s')(le)) : '+Inf');
  return <>
    <svg width={width} height={height - 16} fontSize={11} fill={theme.colors.text.primary}>
      {rows.flatMap((_, row) => times.filter((at) => count(row, at) > 1e-9).map((at) =>
        <rect key={`${row}-${at}`} x={x(at - page.step * 1000)} y={high - high * (row + 1) / rows.length} fill="#ff8833"
          width={Math.max(wide * page.step / (page.to - page.from) - 1, 1)} height={high / rows.length - 1}
          opacity={0.12 + 0.88 * Math.sqrt(count(row, at) / most)} />))}
      {rows.map(({ le }, row) => <text key={le} x={50} textAnchor="end" y={high - high * (row + 0.5) / rows.length + 4}>{seconds(le)}</text>)}
      {[0.1, 0.5, 0.9].map((part) => <text key={part} x={56 + wide * part} y={high + 15} textAnchor="middle">
        {new Date((page.from + part * (page.to - page.from)) * 1000).toISOString().slice(11, 19)}</text>)}
    </svg>
    <Sketch>Sketch: @grafana/ui has no heatmap. Up to {most.toFixed(1)} in a cell.</Sketch>
  </>;
}

function World({ frames, width, height, drawn: { panel } }: Props): ReactNode {
  const lookup = panel.options.layers[0].location.lookup;
  const frame = frames.find(({ fields }) => fields.some((field: Field) => field.name === lookup || field.config.displayName === lookup));
  const numbers = frame?.fields.find(({ type }) => type === FieldType.number)?.values ?? [];
  const codes = frame?.fields.find((field) => field.name === lookup || field.config.displayName === lookup)?.values ?? [];
  const [wide, high] = [width, height - 16];
  const point = ([lon, lat]: number[]) => [wide * (lon + 180) / 360, high * (85 - lat) / 145].map((n) => n.toFixed(1)).join(' ');
  const line = (ring: number[][]) => ring.map((spot, index) =>
    (index && Math.abs(spot[0] - ring[index - 1][0]) < 180 ? 'L' : 'M') + point(spot)).join('');
  const rings: number[][][] = (feature(land as any, (land as any).objects.land) as any).features[0].geometry.coordinates.flat();
  const { min = 4, max = 30 } = panel.options.layers[0].config.style.size;
  const most = Math.max(...numbers);
  return <>
    <svg width={wide} height={high} style={{ background: '#1b2028' }}>
      <path d={rings.map(line).join('')} fill="#3a3f47" />
      {codes.map((code: string, index: number) => {
        const country = countries.find(({ cca2 }) => cca2 === code);
        const [cx, cy] = country ? point([country.latlng[1], country.latlng[0]]).split(' ') : ['0', '0'];
        return country && <circle key={code} cx={cx} cy={cy} fill="#5794F2" fillOpacity={0.5} stroke="#5794F2"
          r={(min + (max - min) * numbers[index] / most) / 2} />;
      })}
    </svg>
    <Sketch>Sketch: @grafana/ui has no map. {codes.length} countries.</Sketch>
  </>;
}

// ---- The page.

function Dashboard({ page, frames }: { page: Page; frames: DataFrame[][] }): ReactNode {
  const chosen = Object.entries(page.variables).map(([variable, value]) =>
    <span key={variable} style={{ marginRight: 16 }}>{variable} <b>{value}</b></span>);
  return <div style={{ position: 'relative', height: page.height, background: theme.colors.background.canvas }}>
    <div style={{ padding: '8px 10px', color: theme.colors.text.primary }}>
      <div style={{ fontSize: 18 }}>{page.title}</div>
      <div style={{ fontSize: 12, color: theme.colors.text.secondary }}>{chosen}</div>
    </div>
    {page.panels.map((drawn, index) => <div key={index} style={{ position: 'absolute', left: drawn.left, top: drawn.top }}>
      {drawn.panel.type === 'row'
        ? <div style={{ padding: 6, fontSize: 16, fontWeight: 500 }}>⌄ {filled(page, drawn.panel.title)}</div>
        : <PanelChrome title={filled(page, drawn.panel.title ?? '')} description={drawn.panel.description} width={drawn.width}
          height={drawn.height}>
          {(width, height) => <Panel page={page} drawn={drawn} frames={frames[index]} width={width} height={height} />}
        </PanelChrome>}
    </div>)}
  </div>;
}

function App(): ReactNode {
  const [loaded, load] = useState<{ page: Page; frames: DataFrame[][] }>();
  useEffect(() => {
    void (async () => {
      const page: Page = await (await fetch('data.json')).json();
      load({ page, frames: await Promise.all(page.panels.map((drawn) => framesOf(page, drawn))) });
    })();
  }, []);
  return <ThemeContext.Provider value={theme}><GlobalStyles />{loaded && <Dashboard {...loaded} />}</ThemeContext.Provider>;
}

createRoot(document.getElementById('page')!).render(<App />);
